"""Fakes that pass the same contract suites as what they stand for. Public: for users' tests."""
