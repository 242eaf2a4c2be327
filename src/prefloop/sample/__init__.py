"""Sampling: prompts in, groups of answers with their token ids out, behind one `Engine` contract."""
