"""Where images lie: folders, tar shards, the demo's digits; and which of them are broken."""
