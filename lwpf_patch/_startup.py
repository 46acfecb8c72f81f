"""What runs at the start of every interpreter in whose environment a variable begins with ``LWPF_``.

Imported by ``lwpf_patch.pth``. An exception there is only printed and the script runs on, unpatched; so an error is
kept and raised where training begins: when torch, or a host, is first imported.
"""

from functools import partial


def _request(wait: bool = True) -> None:
    """Read the request in the environment, and have it met.

    Args:
        wait: Whether to wait, for a host that is not in the box, until all ``.pth`` files have been read: the package
            that declares it may lie in a folder which a later one adds, as that of an editable install.
    """
    asked: tuple[str, ...] = ()
    try:
        import os

        from .hosts import HOSTS, find_hosts, known_hosts
        from .observing import requesting
        from .options import texts
        from .patching import importing, registry
        from .settings import PATCH, asked_to_observe, from_environment

        asked = texts(os.environ.get(PATCH.variable, ""))
        if wait and not set(asked) <= set(HOSTS):
            return importing.after_site(partial(_request, wait=False))
        hosts, settings = from_environment(known_hosts(asked))
        for host in find_hosts(hosts, PATCH.variable) if hosts else ():
            registry.request(host, settings)
        requesting.request(asked_to_observe())
    except BaseException as error:
        from .patching.importing import arm

        arm(error, ("torch", "timm", "transformers", "hflayers", "deeprc", *asked))


_request()
