"""Operators with no well-kept CPU and GPU library behind them."""
