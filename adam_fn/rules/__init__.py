"""The family: each rule with its aliases beside it, one file a branch."""
