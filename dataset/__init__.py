"""Files to batches, behind data.py: records (json, jsonl), places, batch."""
