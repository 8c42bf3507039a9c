"""The decoder on megatron-core: a folder's config -> sizes, the layers, the weights by name."""
