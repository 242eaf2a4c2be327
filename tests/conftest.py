"""No test reaches for the network: set before anything imports the hub client, which reads it once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
