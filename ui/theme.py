"""The look: one accent, fonts of the visitor's own system (no font is fetched from anywhere)."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent
SANS = ["Inter", "Segoe UI", "system-ui", "-apple-system", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    # Plain strings, not GoogleFont, keep the page off other hosts.
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill="#f7f8fa",
        body_background_fill_dark="#0d1117",
        block_background_fill="#ffffff",
        block_background_fill_dark="#151b23",
        block_border_width="1px",
        block_label_text_size="*text_sm",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#14877e",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )


def css() -> str:
    return (FOLDER / "style.css").read_text(encoding="utf-8")


def head() -> str:
    """Our own script, inside the page."""
    return f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"
