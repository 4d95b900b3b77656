"""`raygym report`: a run as one page that can be sent to somebody, as HTML and as Markdown."""
