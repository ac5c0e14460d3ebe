"""The one scorer behind every runtime, device benchmarks, quality gates and the report."""
