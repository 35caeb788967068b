"""A target that is measured: what a provider runs on this device, how exactly and how fast."""




