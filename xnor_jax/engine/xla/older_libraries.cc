// Stand-ins for what newer releases of glibc and libstdc++ have under new versions, so that
// an older distribution loads a library that was built with them. All are hidden: nothing
// but this library sees them. `packaging/floor.py` tells whether one is missing.
#include <new>  // which tells the two libraries' names

#if defined(__GLIBC__) && defined(__GLIBCXX__)

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <mutex>
#include <sstream>

#define STAND_IN(declaration, symbol)                                           \
  extern "C" __attribute__((visibility("hidden"))) declaration __asm__(symbol); \
  declaration

// glibc 2.32: whether counting references may do without atomic instructions. It may not:
// XLA has threads.
STAND_IN(char single_threaded, "__libc_single_threaded");

#if defined(__x86_64__) || defined(__aarch64__)
// glibc 2.33; before, it was inline. The kernel's structure is glibc's here.
STAND_IN(int status(const char* path, struct stat* found), "stat") {
  return static_cast<int>(syscall(SYS_newfstatat, AT_FDCWD, path, found, 0));
}
#endif

// libstdc++ 11: such a size was told by std::bad_alloc before.
STAND_IN(void throw_bad_array_new_length(), "_ZSt28__throw_bad_array_new_lengthv") {
  throw std::bad_alloc();
}

// libstdc++ 12: its older version had the same name.
STAND_IN(void wait(std::condition_variable* changed, std::unique_lock<std::mutex>* lock),
         "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE") {
  pthread_cond_wait(changed->native_handle(), lock->mutex()->native_handle());
}

// libstdc++ 9: it was in the header, with the mode as an argument. XLA's headers use it.
STAND_IN(void construct(void* stream),
         "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev") {
  new (stream) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// libstdc++ 11: the parts of a copy and of a destruction, which were whole before.
extern "C" void copy(void* to, const std::exception_ptr* from) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy(std::exception_ptr* pointer) __asm__(
    "_ZNSt15__exception_ptr13exception_ptrD1Ev");

STAND_IN(void add_reference(std::exception_ptr* pointer),
         "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv") {
  alignas(std::exception_ptr) std::byte never_destroyed[sizeof(std::exception_ptr)];
  copy(never_destroyed, pointer);
}

STAND_IN(void release(std::exception_ptr* pointer),
         "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv") {
  destroy(pointer);
}

#endif
