"""Audio, images and videos in front of the decoder: a file -> features and placeholders -> towers
-> the input sequence.
"""
