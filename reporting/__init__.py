"""What report.py is made of: charts and readable rollouts."""
