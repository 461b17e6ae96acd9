//! The QMP wire format, schema and server loop; knows nothing of disks.
