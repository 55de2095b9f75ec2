"""From an adapter on the disk to one commit on the Hub: staged, checked, committed once."""
