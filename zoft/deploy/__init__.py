"""Stage two: the fine-tuning loop, its journal, replay and the run folder."""
