"""Fast paths: a layer's output without its effective weight, for methods that declare one."""
