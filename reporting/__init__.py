"""What a run's page shows. These modules make plain values; assets/report.html, a Jinja2 template, makes the HTML."""
