//! The NBD protocol, a server of block devices, and a client that is one.
