//! QEMU commands as libvirt, Proxmox VE, avocado-vt and Kata Containers write them, with names
//! changed, and what this host lacks (KVM, bridges, Proxmox' own option `-id`) replaced; a machine
//! type with a version is of the oldest QEMU that pageferry takes. Each guest moves with its
//! command as it is, and with all of its memory compared.

use pageferry_tests::SOON;
use pageferry_tests::stage::Stage;
use std::fs::File;

/// Moves a guest of this command. `{d}` stands for a directory of its own that has a disk of 16
/// MiB, and `{s}` for one that each side has for itself.
fn moves(command: &str) {
    let stage = Stage::new();
    let disk = stage.path("disk.raw");
    File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let side = |name: &str| {
        let own = stage.path(&format!("{name}.d"));
        std::fs::create_dir(&own).unwrap();
        let shared = disk.parent().unwrap().display().to_string();
        let command: Vec<_> = command.split_whitespace().collect();
        command.join(" ").replace("{s}", &own.display().to_string()).replace("{d}", &shared)
    };
    let mut source = stage.run("src", &side("src"), "");
    let destination = stage.receive("dst", &side("dst"), "");
    let ran = source.guest_runs();
    let ended = stage.migrate("src", destination.address(), &["--verify"]).end(SOON);
    assert_eq!(ended.status, Some(0), "{}", ended.stderr);
    assert_eq!(source.end(), Some(0));
    assert_eq!(destination.guest_runs(), ran);
}

#[test]
fn libvirts() {
    moves(
        r#"qemu-system-x86_64 -name guest=web,debug-threads=on -S
        -machine pc-q35-8.0,usb=off,dump-guest-core=off,memory-backend=pc.ram,hpet=off,acpi=on -accel tcg
        -cpu qemu64,x2apic=on,hypervisor=on,lahf-lm=on -m size=65536k
        -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":67108864}
        -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -uuid 0e7a6b8a-51b3-4f0e-9a5c-5f5a4d3c2b1a
        -no-user-config -nodefaults -display none
        -chardev socket,id=charmonitor,path={s}/monitor.sock,server=on,wait=off
        -mon chardev=charmonitor,id=monitor,mode=control
        -rtc base=utc,driftfix=slew -no-shutdown -global ICH9-LPC.disable_s3=1 -global ICH9-LPC.disable_s4=1
        -boot strict=on
        -device {"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}
        -device {"driver":"pcie-root-port","port":17,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x2.0x1"}
        -device {"driver":"pcie-root-port","port":18,"chassis":3,"id":"pci.3","bus":"pcie.0","addr":"0x2.0x2"}
        -device {"driver":"pcie-root-port","port":19,"chassis":4,"id":"pci.4","bus":"pcie.0","addr":"0x2.0x3"}
        -device {"driver":"qemu-xhci","p2":15,"p3":15,"id":"usb","bus":"pci.2","addr":"0x0"}
        -blockdev {"driver":"file","filename":"{d}/disk.raw","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap"}
        -blockdev {"node-name":"libvirt-1-format","read-only":false,"discard":"unmap","driver":"raw","file":"libvirt-1-storage"}
        -device {"driver":"virtio-blk-pci","bus":"pci.3","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}
        -netdev {"type":"user","id":"hostnet0"}
        -device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:a1:b2:c3","bus":"pci.1","addr":"0x0"}
        -chardev pty,id=charserial0 -device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}
        -device {"driver":"usb-tablet","id":"input0","bus":"usb.0","port":"1"}
        -audiodev {"id":"audio1","driver":"none"} -global ICH9-LPC.noreboot=off -watchdog-action reset
        -device {"driver":"virtio-balloon-pci","id":"balloon0","bus":"pci.4","addr":"0x0"}
        -object {"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}
        -device {"driver":"virtio-rng-pci","rng":"objrng0","id":"rng0","bus":"pcie.0","addr":"0x4"}
        -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on"#,
    );
}

#[test]
fn proxmoxs() {
    moves(
        r#"qemu-system-x86_64 -name web,debug-threads=on -no-shutdown
        -chardev socket,id=qmp,path={s}/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control
        -chardev socket,id=qmp-event,path={s}/event,server=on,wait=off -mon chardev=qmp-event,mode=control
        -pidfile {s}/100.pid -smbios type=1,uuid=7b10d7af-b932-4c66-b2c3-3996152ec465 -smp 2,sockets=1,cores=2,maxcpus=2
        -nodefaults -boot menu=on,strict=on,reboot-timeout=1000 -display none -accel tcg -cpu qemu64,+aes,+popcnt,+sse4.1
        -m 64 -object {"id":"throttle-drive-scsi0","limits":{},"qom-type":"throttle-group"}
        -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e
        -device pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f
        -device piix3-usb-uhci,id=uhci,bus=pci.0,addr=0x1.0x2 -device usb-tablet,id=tablet,bus=uhci.0,port=1
        -device VGA,id=vga,bus=pci.0,addr=0x2 -device virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on
        -object iothread,id=iothread-virtioscsi0
        -device virtio-scsi-pci,id=virtioscsi0,bus=pci.2,addr=0x1,iothread=iothread-virtioscsi0
        -drive file={d}/disk.raw,if=none,id=drive-scsi0,format=raw,cache=none,aio=threads,detect-zeroes=on
        -device scsi-hd,bus=virtioscsi0.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi0,id=scsi0,bootindex=100
        -netdev type=user,id=net0
        -device virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0,rx_queue_size=1024,tx_queue_size=256,bootindex=102
        -machine type=pc,hpet=off"#,
    );
}

#[test]
fn avocado_vts() {
    moves(
        r#"qemu-system-x86_64 -S -name avocado-vt-vm1 -sandbox on -machine q35,memory-backend=mem-machine_mem -accel tcg
        -device {"id":"pcie-root-port-0","driver":"pcie-root-port","multifunction":true,"bus":"pcie.0","addr":"0x1","chassis":1}
        -device {"id":"pcie-pci-bridge-0","driver":"pcie-pci-bridge","addr":"0x0","bus":"pcie-root-port-0"}
        -nodefaults -display none -device {"driver":"VGA","bus":"pcie.0","addr":"0x2"} -m 64
        -object {"size":67108864,"id":"mem-machine_mem","qom-type":"memory-backend-ram"}
        -smp 2,maxcpus=2,cores=1,threads=1,dies=1,sockets=2 -cpu qemu64
        -chardev socket,wait=off,server=on,path={s}/monitor-qmp1,id=qmp_id_qmpmonitor1 -mon chardev=qmp_id_qmpmonitor1,mode=control
        -chardev socket,wait=off,server=on,path={s}/monitor-catch,id=qmp_id_catch_monitor -mon chardev=qmp_id_catch_monitor,mode=control
        -device {"ioport":1285,"driver":"pvpanic","id":"idQkDzFb"}
        -chardev socket,wait=off,server=on,path={s}/serial0,id=chardev_serial0
        -device {"id":"serial0","driver":"isa-serial","chardev":"chardev_serial0"}
        -chardev socket,id=seabioslog_id,path={s}/seabios,server=on,wait=off -device isa-debugcon,chardev=seabioslog_id,iobase=0x402
        -device {"id":"pcie-root-port-1","port":1,"driver":"pcie-root-port","addr":"0x1.0x1","bus":"pcie.0","chassis":2}
        -device {"driver":"qemu-xhci","id":"usb1","bus":"pcie-root-port-1","addr":"0x0"}
        -device {"driver":"usb-tablet","id":"usb-tablet1","bus":"usb1.0","port":"1"}
        -object {"qom-type":"iothread","id":"iothread0"}
        -device {"id":"pcie-root-port-2","port":2,"driver":"pcie-root-port","addr":"0x1.0x2","bus":"pcie.0","chassis":3}
        -device {"id":"virtio_scsi_pci0","driver":"virtio-scsi-pci","bus":"pcie-root-port-2","addr":"0x0","iothread":"iothread0"}
        -blockdev {"node-name":"file_image1","driver":"file","auto-read-only":true,"discard":"unmap","aio":"threads","filename":"{d}/disk.raw","cache":{"direct":true,"no-flush":false}}
        -blockdev {"node-name":"drive_image1","driver":"raw","read-only":false,"cache":{"direct":true,"no-flush":false},"file":"file_image1"}
        -device {"driver":"scsi-hd","id":"image1","drive":"drive_image1","write-cache":"on"}
        -device {"id":"pcie-root-port-3","port":3,"driver":"pcie-root-port","addr":"0x1.0x3","bus":"pcie.0","chassis":4}
        -device {"driver":"virtio-net-pci","mac":"9a:37:91:ba:b2:20","id":"idyBtDvq","netdev":"idPUBlb6","bus":"pcie-root-port-3","addr":"0x0"}
        -netdev {"id":"idPUBlb6","type":"user"} -rtc base=utc,clock=host,driftfix=slew
        -boot menu=off,order=cdn,once=c,strict=off"#,
    );
}

#[test]
fn katas() {
    moves(
        r#"qemu-system-x86_64 -name sandbox-6c1b,debug-threads=on -uuid 2f9d9be6-1f2b-4e0e-9b0c-9f9a3d1f6c1b
        -machine q35,accel=tcg,nvdimm=on -cpu max,pmu=off -qmp unix:{s}/qmp.sock,server=on,wait=off -m 64M,slots=10,maxmem=1024M
        -device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m
        -device virtio-serial-pci,disable-modern=true,id=serial0 -device virtconsole,chardev=charconsole0,id=console0
        -chardev socket,id=charconsole0,path={s}/console.sock,server=on,wait=off
        -device virtio-scsi-pci,id=scsi0,disable-modern=false -object rng-random,id=rng0,filename=/dev/urandom
        -device virtio-rng-pci,rng=rng0 -device pcie-root-port,id=rp1,bus=pcie.0,chassis=0,slot=0,multifunction=off,pref64-reserve=2097152B,mem-reserve=4194304B
        -netdev user,id=network-0 -device driver=virtio-net-pci,netdev=network-0,mac=02:00:ca:fe:00:48,disable-modern=false
        -rtc base=utc,driftfix=slew,clock=host -vga none -no-user-config -nodefaults -nographic --no-reboot
        -object memory-backend-file,id=dimm1,size=64M,mem-path=/dev/shm,share=on -numa node,memdev=dimm1
        -pidfile {s}/pid -smp 1,cores=1,threads=1,sockets=2,maxcpus=2"#,
    );
}

#[test]
fn old_style_by_hand() {
    moves(
        "qemu-system-x86_64 -accel tcg -hda {d}/disk.raw -net nic,model=e1000 -net user -usb -m 64 -display none -serial null -monitor none",
    );
}
