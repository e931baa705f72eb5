"""Sampling: continues documents with text and images, from a checkpoint of any layout."""
