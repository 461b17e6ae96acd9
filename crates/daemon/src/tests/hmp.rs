//! Lines of the monitor for people.

use serde_json::json;

use super::*;

impl Client {
    fn line(&mut self, line: &str) -> String {
        let text = self.run("human-monitor-command", json!({"command-line": line, "cpu-index": 0}));
        text.as_str().unwrap().replace("\r\n", "\n")
    }

    /// The same without the figures of time.
    fn io(&mut self, device: &str, command: &str) -> String {
        let text = self.line(&format!("qemu-io {device} \"{command}\""));
        text.split_inclusive('\n')
            .map(|line| line.split(" ops;").next().unwrap().trim_end().to_owned() + "\n")
            .collect()
    }
}

#[test]
fn lines_are_answered_as_qemu_answers_them() {
    let mut client = Client::new();
    client.chain();
    for (line, text) in [
        ("", ""),
        ("nosuch x", "unknown command: 'nosuch'\n"),
        ("info  nosuch x", "unknown command: 'info  nosuch'\n"),
        ("  info   block-jobs", "No active jobs\n"),
        (
            "info block-jobs x",
            "block-jobs: extraneous characters at the end of line\nTry \"help info block-jobs\" for more information\n",
        ),
        (
            "drive_mirror top",
            "drive_mirror: string expected\nTry \"help drive_mirror\" for more information\n",
        ),
        (
            "block_job_set_speed top x",
            "invalid size\nTry \"help block_job_set_speed\" for more information\n",
        ),
        ("block_job_set_speed top 1", "Error: Block job 'top' not found\n"),
        ("block_job_cancel -f top", "Error: Block job 'top' not found\n"),
        ("drive_mirror zz /t", "Error: Cannot find device='zz' nor node-name='zz'\n"),
        ("drive_mirror -n top /nosuch/t", "Error: Could not open '/nosuch/t': No such file or directory\n"),
        ("drive_mirror top /nosuch/t wat", "Error: Unknown file format 'wat'\n"),
        ("block_stream top 0 /nope", "Error: Can't find '/nope' in the backing chain\n"),
        ("help block_job_pause", "block_job_pause device -- pauses a job\n"),
        ("help nosuch", "unknown command: 'nosuch'\n"),
        ("qemu-io zz \"read 0 1\"", "Error: Cannot find device='' nor node-name='zz'\n"),
        ("qemu-io -d top \"read 0 1\"", "Error: Device 'top' not found\n"),
    ] {
        assert_eq!(client.line(line), text, "{line}");
    }
    assert_eq!(client.line("?").lines().count(), 9);
    assert!(client.line("info").starts_with("info block-jobs "));
}

#[test]
fn requests_by_hand_are_answered_as_the_tool_answers_them() {
    let mut client = Client::new();
    client.chain();
    for (command, text) in [
        ("write -P 0x55 64k 2000", "wrote 2000/2000 bytes at offset 65536\n1.953 KiB, 1\n"),
        (
            "read -P 85 64k 2k",
            "Pattern verification failed at offset 65536, 2048 bytes\nread 2048/2048 bytes at offset 65536\n2 KiB, 1\n",
        ),
        ("read -l 2000 -P 85 64k 2k", "read 2048/2048 bytes at offset 65536\n2 KiB, 1\n"),
        ("read -s 2000 -l 48 -P 1 64k 2k", "read 2048/2048 bytes at offset 65536\n2 KiB, 1\n"),
        ("read -s 2049 -P 1 64k 2k", "pattern verification range exceeds end of read data\n"),
        (
            "read -v 65k 18",
            "00010400:  55 55 55 55 55 55 55 55 55 55 55 55 55 55 55 55  UUUUUUUUUUUUUUUU\n00010410:  55 55  UU\nread 18/18 bytes at offset 66560\n18 bytes, 1\n",
        ),
        ("read -q 0 1M", ""),
        ("r 1M 1", "read failed: Input/output error\n"),
        ("read 1023k 2k", "read failed: Input/output error\n"),
        ("read 0", "bad argument count 1 to read, expected at least 2 arguments\n"),
        ("read 0 3G", "length cannot exceed 2147483136, given 3G\n"),
        ("read a 1", "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- a\n"),
        (
            "read 0 -P 1",
            "read [-Cqrv] [-P pattern [-s off] [-l len]] off len -- reads a number of bytes at a specified offset\n",
        ),
        (
            "discard -x 0 1",
            "discard: invalid option -- 'x'\ndiscard [-Cq] off len -- discards a number of bytes at a specified offset\n",
        ),
        ("write -zu 64k 64k", "wrote 65536/65536 bytes at offset 65536\n64 KiB, 1\n"),
        ("read -P 0 64k 64k", "read 65536/65536 bytes at offset 65536\n64 KiB, 1\n"),
        ("write -u 0 1", "-u requires -z to be specified\n"),
        ("write -z -P 1 0 1", "Only one of -z, -P, and -s can be specified at the same time\n"),
        ("write -P 300 0 1", "300 is not a valid pattern byte\n"),
        ("write 0 3G", "length cannot exceed 2147483136 without -n, given 3G\n"),
        ("write -s /nosuch 0 1", "/nosuch: No such file or directory\n"),
        ("w -qf 0 1k", ""),
        ("read -P 0xcd 0 1k", "read 1024/1024 bytes at offset 0\n1 KiB, 1\n"),
        ("discard 0 64k", "discard 65536/65536 bytes at offset 0\n64 KiB, 1\n"),
        ("flush", ""),
        ("flush 1", "bad argument count 1 to flush, expected 0 arguments\n"),
        ("", ""),
        ("nosuch", "command \"nosuch\" not found\n"),
    ] {
        assert_eq!(client.io("top", command), text, "{command}");
    }
    let source = client.path("source");
    std::fs::write(&source, [7, 8, 9]).unwrap();
    client.io("top", &format!("write -q -s {} 10 5", source.display()));
    assert!(client.io("top", "read -v 10 5").starts_with("0000000a:  07 08 09 07 08  ....."));
}

#[test]
fn requests_longer_than_a_piece_are_done_whole() {
    let mut client = Client::new();
    let null = json!({"driver": "null-co", "node-name": "n", "read-zeroes": true, "size": 8 << 20});
    client.run("blockdev-add", null);
    assert_eq!(client.io("n", "write 1 3M"), "wrote 3145728/3145728 bytes at offset 1\n3 MiB, 1\n");
    let verified = "read 4194304/4194304 bytes at offset 0\n4 MiB, 1\n";
    assert_eq!(client.io("n", "read -P 0 -s 3M -l 5 0 4M"), verified);
    assert_eq!(
        client.io("n", "read -P 1 -s 3M -l 5 0 4M"),
        format!("Pattern verification failed at offset 3145728, 5 bytes\n{verified}")
    );
}

/// A mirror is started, steered and ended by lines; what is written by hand meanwhile reaches its target.
#[test]
fn a_mirror_sees_what_is_written_by_hand() {
    let mut client = Client::new();
    client.chain();
    let target = client.path("target.qcow2");
    assert_eq!(client.line(&format!("drive_mirror -f top {}", target.display())), "");
    client.wait("BLOCK_JOB_READY");
    assert_eq!(client.line("block_job_set_speed top 1.5"), "");
    assert_eq!(client.io("top", "write -q -P 5 320k 64k"), "");
    assert_eq!(client.line("block_job_pause top"), "");
    assert_eq!(client.line("block_job_pause top"), "Error: Job is already paused\n");
    // A job that is resumed before it has come to rest has not changed its state, and tells of none.
    client.wait_for_status("standby");
    assert_eq!(client.line("block_job_resume top"), "");
    client.wait_for_status("ready");
    let list = client.line("info block-jobs");
    assert!(list.starts_with("Type mirror, device top: Completed "), "{list}");
    assert!(list.ends_with(" bytes, speed limit 1572864 bytes/s\n"), "{list}");
    assert_eq!(client.line("block_job_complete top"), "");
    client.wait_for_status("null");
    assert_eq!(client.line("info block-jobs"), "No active jobs\n");
    client.add("t", "target.qcow2", Value::Null);
    assert_eq!(client.blocks("t"), [1, 2, 3, 5]);
}

#[test]
fn nothing_is_written_by_hand_that_somebody_else_relies_on() {
    let mut client = Client::new();
    client.chain();
    client.image("t.qcow2", 9, None);
    client.add("t", "t.qcow2", Value::Null);
    client.run("blockdev-mirror", json!({"job-id": "m", "device": "top", "target": "t", "sync": "full"}));
    assert_eq!(
        client.io("t", "write 0 1"),
        "Permission conflict on node 't': permissions 'write' are both required by an unnamed block device (uses node 't' as \
         'root' child) and unshared by block job 'm': mirror (uses node 't' as 'root' child).\n"
    );
    let file = json!({"driver": "file", "filename": client.path("mid.qcow2")});
    client.run(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "ro", "read-only": true, "file": file, "force-share": true}),
    );
    assert_eq!(client.io("ro", "write 0 1"), "Block node is read-only\n");
    assert_eq!(client.io("ro", "read -q 0 1"), "");
}

#[test]
fn a_chain_is_streamed_by_a_line() {
    let mut client = Client::new();
    client.chain();
    let base = client.path("base.qcow2");
    assert_eq!(client.line(&format!("block_stream top 1 {}", base.display())), "");
    assert!(client.line("info block-jobs").starts_with("Streaming device top: Completed "));
    client.wait_for_status("null");
    assert_eq!(client.backing("top").as_deref(), Some("base"));
}
