"""What measures kvsched: accuracy and benchmark runs, baselines, shaped links and reports."""
