"""Where the time of training steps goes: `jaxgpt train CONFIG --profile A:B`."""
