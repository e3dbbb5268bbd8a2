"""Encoders and what training adds to them: momentum encoder, queue, batch norm, precision."""
