from harness.pods import Node, Pod
from kata_hybrid.resource.network.links import Link, read_links


def names(pod: Pod) -> list[str]:
    return [link.name for link in pod.inside(read_links)]


def test_a_link_is_described(pod: Pod) -> None:
    (link,) = pod.inside(read_links)
    mac = pod.ip("-o", "link", "show", "eth0").split("link/ether ")[1].split()[0]
    assert link == Link(
        name="eth0",
        mac=mac,
        mtu=1450,
        driver="veth",
        bus="",
        is_ethernet=True,
        has_arp=True,
    )


def test_loopback_and_links_without_an_address_are_left_out(pod: Pod) -> None:
    pod.ip("link", "add", "spare", "type", "bridge")
    assert names(pod) == ["eth0"]


def test_an_address_of_either_family_is_enough(node: Node, pod: Pod) -> None:
    node.join(pod, "six", "fd99::2/64")
    pod.ip("address", "flush", "dev", "eth0")
    assert names(pod) == ["six"]
    pod.ip("address", "add", "10.1.1.1/24", "dev", "eth0", "label", "eth0:1")
    assert names(pod) == ["eth0", "six"]


def test_more_addresses_than_at_first_thought_are_all_seen(pod: Pod) -> None:
    for number in range(100):
        pod.ip("address", "add", f"10.2.{number}.1/32", "dev", "lo")
    pod.ip("address", "flush", "dev", "eth0")
    pod.ip("address", "add", "10.1.1.1/24", "dev", "eth0")
    assert names(pod) == ["eth0"]


def test_a_link_that_takes_no_arp_says_so(pod: Pod) -> None:
    pod.ip("link", "set", "eth0", "arp", "off")
    (link,) = pod.inside(read_links)
    assert not link.has_arp


def test_a_link_without_frames_says_so(pod: Pod) -> None:
    pod.ip("tuntap", "add", "dev", "tun7", "mode", "tun")
    pod.ip("address", "add", "10.99.0.2/24", "dev", "tun7")
    kinds = {link.name: (link.driver, link.is_ethernet) for link in pod.inside(read_links)}
    assert kinds == {"eth0": ("veth", True), "tun7": ("tun", False)}


def test_a_pci_device_is_physical() -> None:
    def link(bus: str) -> Link:
        return Link(name="n", mac="", mtu=1, driver="d", bus=bus, is_ethernet=True, has_arp=True)

    assert link("0000:00:1f.6").is_physical
    assert not link("").is_physical
    assert not link("tap").is_physical
