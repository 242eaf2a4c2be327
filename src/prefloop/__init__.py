"""prefloop: align language models with preferences that the loop makes for itself.

prompts -> sample -> feedback -> pairs -> train -> (merge) -> evaluate -> report
"""

__version__ = "0.1.0"
