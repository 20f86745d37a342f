"""Files to batches, behind data.py: records (json, jsonl), reader (PyAV), video (frames, sizes, patches), batch."""
