//! Nodes, exports and jobs, driven by QMP.
