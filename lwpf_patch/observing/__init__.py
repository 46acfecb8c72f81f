"""What the attention layers forget while a model trains: figures, which steps they are taken at, where they go.

``statistics`` computes them from a call, ``recording`` knows models, layers and steps, ``writing`` writes the file, the
log and TensorBoard, ``requesting`` is what users call. Nothing is imported here, since a start-up hook makes requests
without torch.
"""
