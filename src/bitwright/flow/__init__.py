"""The only place that chains stages: a bench is set up once, and each job works on it."""
