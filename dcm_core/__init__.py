"""Dual-Expert Consistency Models (arXiv 2506.03123): the library under the ComfyUI nodes.

Schedules, routing, key maps, expert files, conversion, extraction and training. It uses torch and
safetensors and does not import ComfyUI.
"""
