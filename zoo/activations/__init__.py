"""Activations of recent papers, a package per paper."""
