"""The look: one accent, fonts of the visitor's own system (no font is fetched from anywhere)."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from ui.opening import terms

TERMS = "/*TERMS*/{}"
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
        button_primary_background_fill_hover_dark="#115e59",
        button_cancel_background_fill="#ffffff",
        button_cancel_background_fill_dark="#151b23",
        button_cancel_border_color="#d0d7e0",
        button_cancel_border_color_dark="#39434f",
        button_cancel_text_color="#b42318",
        button_cancel_text_color_dark="#ff8a7a",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#1c2430",
        button_secondary_border_color="#d0d7e0",
        button_secondary_border_color_dark="#39434f",
        button_border_width="1px",
        body_text_color="#17202b",
        body_text_color_dark="#e6ebf2",
        block_info_text_color="#4b5868",
        block_info_text_color_dark="#a9b6c6",
        block_label_text_color="#17202b",
        block_label_text_color_dark="#e6ebf2",
        block_title_text_color="#17202b",
        block_title_text_color_dark="#e6ebf2",
        block_title_text_size="*text_sm",
        input_placeholder_color="#5b6878",
        input_placeholder_color_dark="#93a1b3",
        slider_color="#0f766e",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )


def css() -> str:
    return (FOLDER / "style.css").read_text(encoding="utf-8")


def head() -> str:
    """Our own script, inside the page, with the words for the tiles' tooltips in it."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return f"<script>{script.replace(TERMS, json.dumps(terms()), 1)}</script>"
