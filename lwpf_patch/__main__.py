"""``python -m lwpf_patch`` is the command ``lwpf``."""

from .cli import main

raise SystemExit(main())
