"""Dual-Expert Consistency Models (arXiv 2506.03123): the library under the ComfyUI nodes.

Knows torch and safetensors, nothing of ComfyUI: schedules, routing, key maps, expert files,
conversion and extraction.
"""
