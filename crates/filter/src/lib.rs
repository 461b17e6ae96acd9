//! Small devices over a device: throttle, copy-on-read, fault injection, null.
