"""A plan and a model -> a smaller model: masked, pruned, sliced, reconstructed, saved and
loaded.
"""
