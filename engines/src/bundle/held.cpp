#include "bundle/held.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "failure.hpp"

namespace ojfa::core {
namespace {

const char* const WHOLE = "copy the bundle again whole, or build it again";
const char* const LOAD_AGAIN =
    "load the bundle again; its files must stay as they are while a process uses them, so put a new bundle "
    "into a directory of its own";
// Bytes that the system is asked for ahead of those that are read.
constexpr std::uint64_t AHEAD = 16 << 20;

Failure unreadable(const std::filesystem::path& path, int error) {
    const std::string message = path.string() + " can't be read: " + std::strerror(error);
    if (error == EMFILE || error == ENFILE)
        return bundle_failure(message, "close some files, or raise the limit of open ones: ulimit -n");
    return bundle_failure(message, WHOLE);
}

Failure special(const std::filesystem::path& path) {
    return bundle_failure(
        path.string() + " is a symbolic link or special file; a bundle holds plain files only",
        "use a fresh copy of the bundle");
}

Failure changed(const std::filesystem::path& path) {
    return bundle_failure(path.string() + " was replaced or changed since the bundle was opened", LOAD_AGAIN);
}

FileState state_of(const Descriptor& descriptor, const std::filesystem::path& path) {
    struct stat status {};
    if (fstat(descriptor.number(), &status)) throw unreadable(path, errno);
    return FileState(status);
}

Descriptor open_directory(const std::filesystem::path& path) {
    Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECTORY));
    if (descriptor.number() < 0) throw unreadable(path, errno);
    return descriptor;
}

// `shown` is the path for messages.
Descriptor open_plain(int directory, const std::string& name, const std::filesystem::path& shown) {
    Descriptor descriptor(
        ::openat(directory, name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW | O_NOCTTY));
    if (descriptor.number() < 0) {
        if (errno == ELOOP || errno == ENXIO) throw special(shown);  // of a link, of a socket
        throw unreadable(shown, errno);
    }
    struct stat status {};
    if (fstat(descriptor.number(), &status)) throw unreadable(shown, errno);
    if (!S_ISREG(status.st_mode)) throw special(shown);
    return descriptor;
}

// Bytes read, as many as there is room for but at the end.
std::size_t read_at(const Descriptor& descriptor, Span<char> room, std::uint64_t position,
                    const std::filesystem::path& path) {
    std::size_t filled = 0;
    while (filled < room.size()) {
        const ssize_t count = ::pread(descriptor.number(), room.data() + filled, room.size() - filled,
                                      static_cast<off_t>(position + filled));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw unreadable(path, errno);
        if (!count) break;
        filled += static_cast<std::size_t>(count);
    }
    return filled;
}

}  // namespace

Descriptor::~Descriptor() {
    if (number_ >= 0) ::close(number_);
}

std::string read_plain(const std::filesystem::path& path, std::uint64_t most) {
    const Descriptor descriptor = open_plain(AT_FDCWD, path.string(), path);
    const std::uint64_t size = state_of(descriptor, path).size;
    if (size > most)
        throw bundle_failure(path.string() + " has " + std::to_string(size) + " bytes, more than the " +
                                 std::to_string(most) + " that it may have",
                             WHOLE);
    std::string text(size, '\0');
    text.resize(read_at(descriptor, {text.data(), text.size()}, 0, path));
    return text;
}

FileState::FileState(const struct stat& status)
    : device(status.st_dev),
      inode(status.st_ino),
      size(static_cast<std::uint64_t>(status.st_size)),
      modified(status.st_mtim.tv_sec),
      modified_ns(status.st_mtim.tv_nsec),
      changed(status.st_ctim.tv_sec),
      changed_ns(status.st_ctim.tv_nsec) {}

bool FileState::operator==(const FileState& other) const {
    return device == other.device && inode == other.inode && size == other.size &&
           modified == other.modified && modified_ns == other.modified_ns && changed == other.changed &&
           changed_ns == other.changed_ns;
}

HeldFile::HeldFile(Descriptor descriptor, std::filesystem::path path, const FileState& state,
                   std::uint64_t start)
    : descriptor_(std::move(descriptor)),
      path_(std::move(path)),
      state_(state),
      position_(start),
      advised_(start) {
    check_unchanged();
}

std::size_t HeldFile::read(Span<char> room) {
    if (position_ + AHEAD / 2 >= advised_) {
        posix_fadvise(descriptor_.number(), static_cast<off_t>(advised_), AHEAD, POSIX_FADV_WILLNEED);
        advised_ += AHEAD;
    }
    const std::size_t filled = read_at(descriptor_, room, position_, path_);
    position_ += filled;
    check_unchanged();  // who writes marks the file first: what was read is what it held
    return filled;
}

void HeldFile::check_unchanged() const {
    if (!(state_of(descriptor_, path_) == state_)) throw changed(path_);
}

HeldFiles::HeldFiles(std::filesystem::path directory)
    : directory_(std::move(directory)), descriptor_(open_directory(directory_)) {}

bool HeldFiles::hold(const std::string& name) {
    struct stat status {};
    if (fstatat(descriptor_.number(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW)) {
        if (errno == ENOENT || errno == ENOTDIR) return false;
        throw unreadable(directory_ / name, errno);
    }
    if (!S_ISREG(status.st_mode)) throw special(directory_ / name);
    states_.insert_or_assign(name, FileState(status));
    return true;
}

HeldFile HeldFiles::open(const std::string& name, std::uint64_t start) const {
    const std::filesystem::path path = directory_ / name;
    const FileState& state = states_.at(name);
    struct stat status {};
    if (fstatat(descriptor_.number(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW)) {
        if (errno != ENOENT && errno != ENOTDIR) throw unreadable(path, errno);
        throw bundle_failure(path.string() + " is gone since the bundle was opened", LOAD_AGAIN);
    }
    if (!(FileState(status) == state)) throw changed(path);  // not even opened
    return {open_plain(descriptor_.number(), name, path), path, state, start};
}

std::vector<char> HeldFiles::read(const std::string& name, std::uint64_t offset, std::uint64_t bytes) const {
    std::vector<char> content(bytes);
    HeldFile file = open(name, offset);
    if (file.read(content) != bytes)
        throw bundle_failure((directory_ / name).string() + " ends too early", WHOLE);
    return content;
}

std::vector<char> HeldFiles::read(const std::string& name) const {
    return read(name, 0, size(name));
}

}  // namespace ojfa::core
