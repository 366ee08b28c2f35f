"""Engines: programs that run language models, behind one small interface (`base.Engine`)."""
