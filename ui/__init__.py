"""The page. Gradio only: it shows what experiments emit, and measures nothing."""
