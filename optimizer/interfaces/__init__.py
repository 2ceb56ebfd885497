"""Interfaces of passes and backends: the modules that third parties import."""
