"""Modules of prepared models, under the names that users of vendor toolchains know."""
