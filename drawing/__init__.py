"""What generate.py draws with: clips and their trajectories, chains of thought, previews."""
