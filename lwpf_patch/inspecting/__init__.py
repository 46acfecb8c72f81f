"""The pictures of ``lwpf inspect``: models and their checkpoints, images, where tokens lie in them, and drawing."""
