"""What everything stands on: files, the model hub, processes, signals, small helpers for models and their cards.

Of this library it imports errors and the version alone.
"""
