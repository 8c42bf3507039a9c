"""Model folders on disk, each format with its reader and its writer: safetensors folder,
torch_dist, Megatron folder.
"""
