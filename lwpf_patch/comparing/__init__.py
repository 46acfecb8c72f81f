"""``lwpf compare``: an unmodified script, run with several kinds of attention and several seeds, and judged."""
