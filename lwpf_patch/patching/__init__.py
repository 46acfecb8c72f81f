"""Patching: what is patched and with what, now or at an import, and what comes of it at the end."""
