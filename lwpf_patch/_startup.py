"""What runs at the start of every interpreter in whose environment a variable begins with ``LWPF_``.

Imported by ``lwpf_patch.pth``. An exception there is only printed and the script runs on, unpatched; so an error is
kept and raised where training begins: when torch, or a host, is first imported.
"""

try:
    from .hosts import HOSTS
    from .observing import requesting
    from .patching import registry
    from .settings import asked_to_observe, from_environment

    _hosts, _settings = from_environment(HOSTS)
    for _host in _hosts:
        registry.request(_host, _settings)
    requesting.request(asked_to_observe())
except BaseException as _error:
    from .patching.importing import arm

    arm(_error, ("torch", "timm", "transformers", "hflayers", "deeprc"))
