"""What the attention layers forget: figures while a model trains, and maps of single inputs.

``statistics`` computes figures from a call, ``recording`` knows models, layers and steps, ``writing`` writes the file,
the log and TensorBoard, ``requesting`` is what users call. ``maps`` returns the weights of each layer. ``scoring`` is
what figures and maps share of a call, ``watchable`` which models they refuse. Nothing is imported here, since a
start-up hook makes requests without torch.
"""
