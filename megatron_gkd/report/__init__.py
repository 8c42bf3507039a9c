"""Runs to be looked at: their folders' files -> one HTML page and a Markdown table. Imports neither
torch nor anything else that is slow.
"""
