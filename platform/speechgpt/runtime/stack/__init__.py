"""Tracking and storage for development, on this machine: PostgreSQL, MLflow and an S3 server, all on loopback."""
